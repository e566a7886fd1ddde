"""Builds the C++ library of products on CPUs (glmjax/kernels/cpu) beside what setup.cfg says.

It is one plain shared library for every Python: its name has no tag, and the wheel is any Python 3's on this platform.
Without a C++ compiler or jaxlib's headers the installation goes on without it, and the wheel is any platform's.
"""

import importlib.util
import os
import pathlib
import shutil
import sys
import sysconfig

import setuptools
from setuptools.command import bdist_wheel
from setuptools.command import build_ext

SOURCES = pathlib.Path("glmjax", "kernels", "cpu", "src")
OPTIONS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-w"]


def headers() -> pathlib.Path | None:
  """Returns the folder of jaxlib's headers; None where there is no jaxlib."""
  found = importlib.util.find_spec("jaxlib")
  folders = found.submodule_search_locations if found else None
  folder = pathlib.Path(folders[0]) / "include" if folders else None
  return folder if folder and folder.is_dir() else None


def lacks() -> str | None:
  """Says what the library cannot be built without and is not here."""
  compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
  if not sys.platform.startswith("linux"):
    return "Linux"
  if not shutil.which(compiler):
    return f"a C++ compiler ({compiler})"
  return None if headers() else "jaxlib's headers"


class BuildLibrary(build_ext.build_ext):
  """Compiles and links a library that is not a Python module."""

  def get_ext_filename(self, fullname: str) -> str:
    """Returns the file's path, without a Python's tag."""
    return f"{os.path.join(*fullname.split('.'))}.so"

  def get_export_symbols(self, ext: setuptools.Extension) -> list[str]:
    """Returns nothing: there is no PyInit function."""
    return ext.export_symbols


class PlatformWheel(bdist_wheel.bdist_wheel):
  """Names the wheel after what is in it."""

  def get_tag(self) -> tuple[str, str, str]:
    """Returns the tags: of this platform where the library was built."""
    built = self.bdist_dir and any(pathlib.Path(self.bdist_dir).rglob("libglmjax_cpu.so"))
    return "py3", "none", super().get_tag()[2] if built else "any"


def extensions() -> list[setuptools.Extension]:
  """Returns the library as setuptools builds it; nothing, and a line that says why, where it cannot be built."""
  lacking = lacks()
  if lacking:
    print(f"glmjax is installed without its library of products on CPUs, for want of {lacking}", file=sys.stderr)
    return []
  return [
    setuptools.Extension(
      "glmjax.kernels.cpu.libglmjax_cpu",
      sources=sorted(map(str, SOURCES.glob("*.cc"))),
      depends=sorted(map(str, SOURCES.glob("*.h"))),
      include_dirs=[str(headers())],
      extra_compile_args=OPTIONS,
      extra_link_args=["-Wl,--strip-all"],
      language="c++",
      optional=True,
    )
  ]


setuptools.setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel})
