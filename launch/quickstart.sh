#!/usr/bin/env bash
# Install relora into .venv, train a small language model with ReLoRA, and sample from it.
#
#   bash launch/quickstart.sh [section.key=value ...]      overrides of configs/quickstart.yaml
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
printf '\nA sample from the prompt "%s":\n\n' "$prompt"
"${relora[@]}" generate "$run" --prompt "$prompt"
printf '\nThe finished model, loaded from disk and evaluated on the held-out text:\n\n'
"${relora[@]}" eval "$run/final"

cat <<END

Done. In $run:
  final/           the model, for AutoModelForCausalLM.from_pretrained
  metrics.jsonl    every number of the run, one JSON object per line
  tensorboard/     the same as curves, with pictures and samples of text
  checkpoints/     from which the same command resumes after an interruption

Curves:            "$root/.venv/bin/python" -m tensorboard.main --logdir "$run"
Another sample:    "$root/.venv/bin/python" -m relora generate "$run" --prompt 'import '
END
