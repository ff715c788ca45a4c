# Short names for what tasks.py does; `make help` lists them. All logic is in tasks.py, which Windows calls directly.
# Another Python: make run PYTHON=python3.12        More arguments: make test ARGS="-m 'not slow'"
# One section: make prove N=5

PYTHON ?= python3
ARGS ?= $(N)
TASKS := help install system run test check export notebooks readme docs lock hooks lab ui new-lesson prove journey thorough shape clean

.DEFAULT_GOAL := help
.PHONY: $(TASKS)

$(TASKS):
	@$(PYTHON) tasks.py $@ $(ARGS)
