# syntax=docker/dockerfile:1
# docker build --target cpu -t mmseg-volo:cpu .     (or --target cuda; docs/container.md)

FROM python:3.13.9-slim-trixie AS base
# libgl1 and libglib2.0-0 for OpenCV; g++ compiles the operators' kernels on first use, and Triton's launchers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS wheel
COPY . /src
WORKDIR /src
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install build --constraint constraints.txt \
    && python -m build --wheel --outdir /wheel

FROM base AS cpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheel,target=/built \
    pip install torch torchvision --index-url "$TORCH_INDEX" --constraint /built/src/constraints.txt \
    && pip install "$(ls /built/wheel/*.whl)[onedl,report]" --constraint /built/src/constraints.txt

FROM base AS cuda-packages
# PyPI's torch brings CUDA's libraries; the driver comes from the host.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheel,target=/built \
    pip install "$(ls /built/wheel/*.whl)[onedl,report]" --constraint /built/src/constraints.txt

FROM base AS command
# In /cache is all that is written outside the mounted folder: weights, compiled kernels, Matplotlib's fonts. A container
# may run as any user, also one without a name.
ENV HF_HOME=/cache/huggingface \
    HOME=/cache \
    MPLCONFIGDIR=/cache/matplotlib \
    PYTHONUNBUFFERED=1 \
    TORCH_HOME=/cache/torch \
    USER=volo \
    XDG_CACHE_HOME=/cache
RUN useradd --uid 1000 --home-dir /cache --no-create-home volo \
    && mkdir --mode 1777 /cache /work
USER 1000
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["mmseg-volo"]
CMD ["--help"]

FROM command AS cpu
COPY --from=cpu-packages /opt/venv /opt/venv

FROM command AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-packages /opt/venv /opt/venv
