"""`bash tests/gpu.sh`: what has to be measured or seen on a GPU, part by part, each in a process of its own."""
