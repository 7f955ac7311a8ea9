# Start this on each of the 4 nodes, in the same directory.
/opt/dtt/bin/python -m dtt.launch.elastic \
  --nnodes 1:4 \
  --nproc-per-node 1 \
  --rdzv-backend c10d \
  --rdzv-id tiny \
  --rdzv-endpoint n1:29400 \
  -m dtt train \
  -c tiny
