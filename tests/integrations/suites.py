"""What became of the libraries' own test suites: paragraphs for docs/compatibility.md."""

PARAGRAPHS: tuple[str, ...] = (
    "Run by hand, not by `make test-integrations`, from the source distributions of the versions above, in one process (gloo, one "
    "rank), with the decorators that ask for a GPU taken off:",
    "",
    "- Transformers, `tests/test_modeling_common.py`: the 4 `test_resize_*_with_deepspeed*` passed on a two-layer Llama. The "
    "distribution lacks `tests/generation` and `tests/exporters`, which the file imports; empty modules stood in.",
    "- Accelerate, `tests/test_dataclasses.py`: `test_sp_deepspeed_handler` passed.",
    "- PEFT, `tests/test_gpu_examples.py`: `test_zero3_ungathered_save_warns_and_gather_succeeds` fails. It expects a warning on saving a "
    "tiny adapter without gathering it; here `deepspeed.initialize` gathers parameters below `stage3_param_persistence_threshold` "
    "for good, so they are whole when PEFT saves them and it has nothing to warn of.",
    "- Accelerate, `tests/test_fp8.py` (3 with DeepSpeed): not run; they need a GPU and Transformer Engine.",
    "- `tests/deepspeed` of Accelerate and Transformers, and the tests of Lightning and TRL, are not in the distributions; most of "
    "them need a GPU or models from the hub. Accelerate's installed scripts (`accelerate/test_utils/scripts/external_deps`) need the "
    "hub too. Not run.",
)
