# The scripts in an image, for a CPU, or for a GPU from a base that has PyTorch with CUDA:
#
#   docker build -t unet .
#   docker build -t unet --build-arg BASE=pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime .
#
# It runs a script in /work; without one, the page of predict.py:
#
#   docker run --rm -v "$PWD:/work" unet train.py --synthetic --out runs/phantoms
#   docker run --rm -v "$PWD:/work" --gpus all --ipc=host unet train.py --data own --out runs/own
#   docker run --rm -v "$PWD:/work" -p 127.0.0.1:7860:7860 unet
ARG BASE=python:3.12-slim
FROM ${BASE}

COPY requirements.txt /unet/
RUN python -c "import torch, torchvision" 2> /dev/null \
    || pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -r /unet/requirements.txt \
    gradio pydicom nibabel SimpleITK onnx onnxscript onnxruntime
COPY *.py /unet/
COPY medseg /unet/medseg
COPY dataset/tumor.pth /unet/dataset/

WORKDIR /work
ENV HOME=/tmp
# The first word is the script, $0, and its arguments follow.
ENTRYPOINT ["sh", "-c", "exec python \"/unet/$0\" \"$@\""]
CMD ["predict.py", "--page", "--host", "0.0.0.0"]
