# docker build -t lora-one .                                 torch for CPUs
# docker build -t lora-one --build-arg TORCH=cu130 .         torch with CUDA 13.0: any folder of torch's own index
# docker run --rm -v "$PWD/runs:/app/runs" -v lora-one-cache:/home/user/.cache lora-one fit --config quickstart.yaml
# with --gpus all for a GPU. Generated code (HumanEval) needs user namespaces: docs/sandbox.md.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# The packages before the code, so that a change of the code does not install them again.
COPY requirements.txt requirements-quantized.txt constraints.txt ./
ARG TORCH=cpu
RUN pip install --no-cache-dir -r requirements.txt -r requirements-quantized.txt -c constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/${TORCH}

COPY . .
# The folders that volumes are put in belong to the user.
RUN useradd --create-home --uid 1000 user \
    && install -d -o user -g user runs /home/user/.cache
USER user
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
