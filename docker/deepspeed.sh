#!/bin/bash
# DeepSpeed's wheel with its CPU optimizer in it, compiled: bash deepspeed.sh FOLDER, in the image's build stage.
set -euo pipefail
folder=$1 work=$(mktemp --directory)

# DeepSpeed asks for -march=native: an image made on a machine with AVX-512 would die of SIGILL on one without.
cat > "$work/c++" <<'WRAPPER'
#!/bin/bash
if [[ $CPU_ARCH != native ]]; then
    set -- "${@/#-march=native/-march=$CPU_ARCH}"
    set -- "${@/#-D__AVX512__/-D__AVX256__}"
fi
exec g++ "$@"
WRAPPER
chmod +x "$work/c++"

DS_ACCELERATOR=cpu DS_BUILD_CPU_ADAM=1 CC=$work/c++ CXX=$work/c++ \
    pip wheel --no-build-isolation --no-deps --no-binary deepspeed --constraint deepspeed.txt \
    --wheel-dir "$work" deepspeed
python3 -m wheel unpack --dest "$work" "$work"/deepspeed-*.whl
unpacked=$(echo "$work"/deepspeed-*/)
op=$(echo "$unpacked"/deepspeed/ops/adam/cpu_adam_op*.so)
strip --strip-debug "$op"
objdump --disassemble "$op" > "$work/op.s"
if [[ $CPU_ARCH == x86-64-v[123] ]] && grep --quiet '%zmm' "$work/op.s"; then
    echo "the CPU optimizer was compiled with AVX-512 in spite of CPU_ARCH=$CPU_ARCH" >&2
    exit 1
fi
# The op has no CUDA code and serves both devices; this says for which of them it may be loaded.
echo 'import os; accelerator_name = os.environ.get("DS_ACCELERATOR", "cpu")' \
    >> "$unpacked"/deepspeed/git_version_info_installed.py
mkdir --parents "$folder"
python3 -m wheel pack --dest-dir "$folder" "$unpacked"
rm -r "$work"
