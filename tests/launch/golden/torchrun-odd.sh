env 'ODD=It'"'"'s "$HOME", `date` \ $(date) & $$' \
  /opt/dtt/bin/python -m dtt.launch.elastic \
  --nnodes 1 \
  --nproc-per-node 1 \
  --standalone \
  -m dtt train \
  -n 'my $run' \
  --sample.prompts 'It'"'"'s "$HOME", `date` \ $(date) & $$'
