# gemq on NVIDIA GPUs. The tests of this repository neither build nor run this file.
#
#   docker build -t gemq .                                     with vLLM: --build-arg EXTRAS=[vllm]
#   docker run --gpus all --ipc host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#     gemq quantize allenai/OLMoE-1B-7B-0924 -o olmoe-2bit     a server: -p 8000:8000 gemq serve olmoe-2bit
FROM python:3.12-slim
# Triton compiles its launchers with gcc.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /gemq/
COPY src /gemq/src
ARG EXTRAS=""
RUN pip install --no-cache-dir "/gemq$EXTRAS" "torch>=2.11,<2.14"
WORKDIR /work
ENTRYPOINT ["gemq"]
