#!/usr/bin/env bash
# wandb 0.31.0 (Python 3.11): WANDB_MODE set to nothing, and a mode given in the code.
#
# Guess, written before the run: an empty variable counts as unset, as WANDB_PROJECT="" does; or the argument of init
# decides, as it does against any other value of the variable.
# What happens: init(mode="offline") raises ValidationError, because the empty text is none of the modes. A wrong value
# is refused in the same way, a right one loses against the argument, and an empty WANDB_PROJECT counts as unset.
#
# Output (2026-11-29):
#     no variable           offline
#     WANDB_MODE=disabled   offline
#     WANDB_MODE=           ValidationError
#     WANDB_PROJECT=        offline
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0 2>/dev/null
cd "$folder"
cat > mode.py <<'PYTHON'
import wandb

try:
    run = wandb.init(mode="offline", project=None)
    print(run.settings.mode)
    run.finish()
except Exception as error:
    print(type(error).__name__)
PYTHON
look() {
    found=$(env -i PATH="$PATH" HOME="$folder" WANDB_SILENT=true "${@:3}" "$folder/venv/bin/python" mode.py 2>/dev/null)
    printf '%-21s %s\n' "$1" "$found"
    [ "$found" = "$2" ]
}
look "no variable" offline
look "WANDB_MODE=disabled" offline WANDB_MODE=disabled
look "WANDB_MODE=" ValidationError WANDB_MODE=
look "WANDB_PROJECT=" offline WANDB_PROJECT=
