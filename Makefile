# Every command sets up what it needs first; nothing has to be exported or edited.
PYTHON ?= python3

.PHONY: help quickstart vulkan test soak bench set-up clean-hgct

help:
	@echo "make quickstart [DATA=PATH]   set up what is missing, then train one model on every kind of device here"
	@echo "make vulkan                   build the worker without Python, for Vulkan adapters (10 to 12 minutes, once)"
	@echo "make test                     build and run all tests"
	@echo "make soak                     the long randomised tests (3000 plans against brute force, 500 kills)"
	@echo "make bench                    measure the efficiency of training (root needed)"
	@echo "make set-up                   environments, the command and the wheel, nothing more"
	@echo "make clean-hgct               remove .hgct: environments, caches and ALL runs with their checkpoints"

quickstart:
	@$(PYTHON) scripts/set_up.py train examples/quickstart/job.toml --plain-loops $(if $(DATA),--data '$(DATA)')

vulkan:
	@$(PYTHON) scripts/vulkan.py

test:
	@$(PYTHON) scripts/test.py

soak: set-up
	HGCT_PLANS=3000 cargo test --locked --release -p hgct-planner --test wide -- brute
	HGCT_KILLS=500 cargo test --locked -p hgct --test training -- a_run_goes_on_after_the_death_of_any_process

bench:
	@$(PYTHON) scripts/set_up.py bench training

set-up:
	@$(PYTHON) scripts/set_up.py

clean-hgct:
	rm -rf .hgct
