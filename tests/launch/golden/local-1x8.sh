/opt/dtt/bin/python -m dtt train -c tiny --world-size 8
