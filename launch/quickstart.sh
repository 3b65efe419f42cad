#!/usr/bin/env bash
# Install relora into .venv, train a small language model by ReLoRA, and try it out.
#
#   bash launch/quickstart.sh [section.key=value ...]      the changes go to configs/quickstart.yaml
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
run=runs/quickstart
for argument in "$@"; do
    case $argument in
        output_dir=*) run=${argument#output_dir=} ;;
    esac
done
[[ $run == /* ]] || run=$root/$run

bash launch/setup.sh plots
relora=(.venv/bin/python -m relora)
"${relora[@]}" train configs/quickstart.yaml "$@"
if [[ ! -d $run/final ]]; then
    exit 0   # --dry-run
fi

prompt='def read_lines(path):'
printf '\nWhat it makes of "%s":\n\n' "$prompt"
"${relora[@]}" generate "$run" --prompt "$prompt"
printf '\nThe finished model, loaded anew and evaluated on the held-out text:\n\n'
"${relora[@]}" eval "$run/final"

cat <<END

Done. In $run:
  final/           the model, for AutoModelForCausalLM.from_pretrained
  metrics.jsonl    every number of the run, one object a line
  tensorboard/     the same as curves, with pictures and samples of text
  checkpoints/     from which the same command goes on when it is stopped

Curves:            "$root/.venv/bin/python" -m tensorboard.main --logdir "$run"
Another sample:    "$root/.venv/bin/python" -m relora generate "$run" --prompt 'import '
END
