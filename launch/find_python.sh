# Sourced in the checkout's root: $python is the one with PyTorch, the caller's $PYTHON before all others.
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
