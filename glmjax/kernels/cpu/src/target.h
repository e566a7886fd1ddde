// TARGET_BEGIN(features) ... TARGET_END: functions between them are compiled for these instructions, without any option
// on the command line.

#pragma once

#define GLMJAX_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET_BEGIN(features) \
  GLMJAX_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END GLMJAX_PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(features) GLMJAX_PRAGMA(GCC push_options) GLMJAX_PRAGMA(GCC target(features))
#define TARGET_END GLMJAX_PRAGMA(GCC pop_options)
#endif
