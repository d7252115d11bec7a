# docker build --build-arg EXTRA=tpu|cuda|cpu -t dynllava_jax .
# The drivers of NVIDIA cards come from the host (docker run --gpus=all); everything else is what requirements.txt pins.
FROM python:3.11-slim
ARG EXTRA=cpu
WORKDIR /dynllava_jax
COPY requirements.txt requirements-cloud.txt requirements-serve.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-cloud.txt -r requirements-serve.txt \
 && version=$(sed -n 's/^jax==//p' requirements.txt) \
 && case "$EXTRA" in \
      tpu) pip install --no-cache-dir "jax[tpu]==$version" ;; \
      cuda) pip install --no-cache-dir "jax[cuda13]==$version" ;; \
      cpu) ;; \
      *) echo "EXTRA is $EXTRA, expected tpu, cuda or cpu" >&2; exit 1 ;; \
    esac
COPY . .
CMD ["python", "-m", "dynllava_jax.hello"]
