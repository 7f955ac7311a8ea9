env 'ODD=It'"'"'s "$HOME", `date` \ $(date) & $$' \
  /opt/dtt/bin/python -m dtt train \
  -n 'my $run' \
  --sample.prompts 'It'"'"'s "$HOME", `date` \ $(date) & $$' \
  --world-size 1
