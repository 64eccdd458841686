# The image of the KubeRay manifests, and of cluster.yaml if you name it there:
#   docker build -t REGISTRY/qcrd_ray:0.1.0 . && docker push REGISTRY/qcrd_ray:0.1.0
# Ray's own image: Python 3.11, CUDA 13 with nvcc, which DeepSpeed looks for, and the user `ray`.
FROM rayproject/ray:2.60.0-py311-cu130

WORKDIR /home/ray/qcrd_ray

# What the project needs, with an empty package in its place: this layer of many gigabytes is built again when a
# version changes, not when the code does.
COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users requirements/constraints.txt requirements/no-deps.txt requirements/
RUN mkdir qcrd_ray && touch qcrd_ray/__init__.py \
    # torch and vLLM for a GPU name these two themselves.
    && grep -vE "^(triton|apache-tvm-ffi)==" requirements/constraints.txt > /tmp/constraints.txt \
    && python -m pip install --no-cache-dir -c /tmp/constraints.txt ".[gpu,hub,lora,optuna,tracking]" \
    && python -m pip install --no-cache-dir --no-deps -r requirements/no-deps.txt \
    # What this build has left is newer than the code, and setuptools copies only what is newer still.
    && rm -r qcrd_ray build *.egg-info

COPY --chown=ray:users qcrd_ray/ qcrd_ray/
RUN python -m pip install --no-cache-dir --no-deps --force-reinstall .

COPY --chown=ray:users jobs/ jobs/
COPY --chown=ray:users tune/ tune/

USER ray
