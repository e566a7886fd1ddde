"""What a step's folder holds, and how steps that are no longer a run's are called."""

import re

STATE, METADATA, RECORD = "state", "metadata", "checksums.json"
MARK = f"{METADATA}/{RECORD}"  # in a bucket a step is whole once it is there
ASIDE = "aside"  # suffix of steps that a run went back behind; kept for their owner to look at or delete
STEP = re.compile("0|[1-9][0-9]{0,17}")
