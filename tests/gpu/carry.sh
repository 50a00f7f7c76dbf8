#!/usr/bin/env bash
# Brings the packages that a machine without a network lacks. README.md lists them.
#
#   bash tests/gpu/carry.sh pack [NAME==VERSION ...]    where pip works: fills .wheels*/
#   bash tests/gpu/carry.sh install [FOLDER]            over there: unpacks .wheels*/ into FOLDER
#
# COGVX_PYTHON=3.12 is the Python over there. Its processor is x86-64, its system Linux.
set -euo pipefail
cd "$(dirname "$0")/../.."
smallest=(
    diffusers==0.42.1
    hydra-core==1.3.8
    omegaconf==2.3.1
    importlib-metadata==10.2.0
    av==18.1.0
)
# In a folder of its own, should one folder at a time be brought over. Older and smaller than what
# requirements.txt pins: 28 MiB instead of 65.
apart=imageio-ffmpeg==0.6.0
platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
for older in manylinux2014 manylinux2010 manylinux1; do
    platforms+=(--platform "${older}_x86_64")
done

fetch() {
    python3 -m pip download --quiet --no-deps --only-binary=:all: \
        --python-version "${COGVX_PYTHON:-3.12}" --implementation cp "${platforms[@]}" \
        --dest "$1" "$2"
}

pack() {
    mkdir -p .wheels .wheels_apart
    for package in "${smallest[@]}" "$@"; do
        fetch .wheels "$package"
    done
    fetch .wheels_apart "$apart"
    # Hydra needs it, and the package index has its source only.
    python3 -m pip wheel --quiet --no-deps --wheel-dir .wheels antlr4-python3-runtime==4.9.3
    ls -l .wheels .wheels_apart
    du -sm .wheels .wheels_apart
}

install() {
    local place=${1:-/tmp/cogvx_packages}
    python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
        --target "$place" .wheels*/*.whl
    PYTHONPATH="$place${PYTHONPATH:+:$PYTHONPATH}" python3 - <<'PYTHON'
import importlib.util

needed = """torch diffusers transformers accelerate peft hydra omegaconf av imageio imageio_ffmpeg
safetensors sentencepiece google huggingface_hub numpy scipy PIL jinja2 markupsafe rich tqdm
filelock yaml psutil""".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
print("everything that is needed is here" if not missing else f"still missing: {' '.join(missing)}")
PYTHON
    echo "export PYTHONPATH=$place${PYTHONPATH:+:$PYTHONPATH}"
}

"${@:-pack}"
