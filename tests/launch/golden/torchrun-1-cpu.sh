/opt/dtt/bin/python -m dtt.launch.elastic \
  --nnodes 1 \
  --nproc-per-node 2 \
  --standalone \
  -m dtt train \
  -c tiny
