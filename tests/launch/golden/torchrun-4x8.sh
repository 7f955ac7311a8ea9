# Start this on each of the 4 nodes, in the same directory.
env NCCL_SOCKET_IFNAME=eth1 \
  /opt/dtt/bin/python -m dtt.launch.elastic \
  --nnodes 4 \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-id 7 \
  --rdzv-endpoint n1:29500 \
  -m dtt train \
  -c gpt2-124m \
  -b 512
