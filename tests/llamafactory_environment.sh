#!/usr/bin/env bash
# Runs the tests against LLaMA-Factory in an environment of their own: it pins older libraries.
#
#     tests/llamafactory_environment.sh [arguments of pytest]
#
# The environment is made once and used again, until this file changes. It lies in
# FASTKTO_LLAMAFACTORY, or else in fastkto/llamafactory in the user's cache folder.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${FASTKTO_LLAMAFACTORY:-${XDG_CACHE_HOME:-$HOME/.cache}/fastkto/llamafactory}
stamp=$(sha256sum <tests/llamafactory_environment.sh)

if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$folder"
    python3 -m venv "$folder"
    install=("$folder/bin/pip" install --quiet --disable-pip-version-check)
    "${install[@]}" torch==2.13.0 # first: what comes later would choose another
    # What its training needs, at the newest versions that it allows; not its web page, its server,
    # its readers of sound and film, nor torchaudio, which loads with its own PyTorch alone.
    "${install[@]}" transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 \
        datasets==4.0.0 "tokenizers<=0.23.0" omegaconf einops pillow sentencepiece tiktoken scipy \
        matplotlib bitsandbytes psutil triton pytest
    "${install[@]}" --no-deps llamafactory==0.9.5 badam==1.4 galore_torch==1.0 apollo_torch==1.0.3 \
        adam-mini==1.1.1
    mkdir "$(echo "$folder"/lib/python3*/site-packages)/torchaudio" # LLaMA-Factory imports it
    echo "$stamp" >"$folder/stamp"
fi

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export DISABLE_VERSION_CHECK=1 LLAMAFACTORY_VERBOSITY=WARN
export PATH="$folder/bin:$PATH" PYTHONPATH="$PWD:$PWD/kernels"
exec "$folder/bin/python" -m pytest tests/test_llamafactory*.py "$@"
