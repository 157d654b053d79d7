"""What these libraries, or this package, refuse: sentences for docs/compatibility.md. Tests beside this file show them."""

REASONS = (
    "Transformers, `TrainingArguments(deepspeed=...)` on a machine without accelerators and without `use_cpu=True`: Accelerate knows "
    "no backend for it, counts one process, and computes `train_batch_size` for one. Add `--use_cpu`.",
    "Transformers, `ACCELERATE_USE_CPU=true`: Accelerate then does not use DeepSpeed at all, without a word.",
    "Transformers, `auto_find_batch_size` at ZeRO stage 3: refused by the Trainer.",
    "Transformers, Wav2Vec2 and its relatives, `from_pretrained` at ZeRO stage 3: the initialisation of version 5 reads a weight-normed "
    "weight outside of any gather. Here that is a `ShardError`. Built under `deepspeed.zero.Init` the model works.",
    "Transformers, `evaluate` before `train` on one Trainer: at stages 1 and 2 the Trainer refuses to evaluate first.",
    "Transformers, `Trainer.train()` a second time: the optimizer's moments start anew, which the plain Trainer keeps.",
    "Transformers, `save_only_model` with `load_best_model_at_end`: refused by the Trainer.",
    "Transformers, `from_pretrained(..., ignore_mismatched_sizes=True)` at ZeRO stage 3: its sharded loader reports "
    "the mismatch as an error all the same.",
    "Transformers, Whisper, `from_pretrained` at ZeRO stage 3: its initialisation asks a sharded embedding for its "
    "shape outside of any gather, and gets `(0,)`.",
    'Transformers, `optim="adafactor"` at ZeRO stages 1 to 3: runs, with a warning and other numbers than without DeepSpeed, since '
    "it sees flat pieces and factors no matrix. At stage 0 it sees whole parameters and the numbers are the same.",
    "Transformers, `from_pretrained` at ZeRO stage 3 after the arguments, with `autotp_size` above 1: version 5.24 refuses to convert "
    "names there. Load the model before `TrainingArguments` are made.",
    "Transformers, a `PipelineModule` as the Trainer's model: the Trainer calls the engine, which trains by `train_batch` alone "
    "(`PipelineError`). Accelerate and Fabric prepare one, and scripts call `train_batch`; give them an iterator that they have not "
    "prepared, since theirs has another part on each rank. A pipeline inside of a LightningModule is refused by name.",
    "Lightning and Fabric on CPU: their DeepSpeed strategies insist on CUDA. The tests and `examples/lightning` lift that check in a "
    "subclass of Lightning's own strategy.",
    "Lightning, `accumulate_grad_batches`: Lightning divides the loss by it and so does `engine.backward`, whose count Lightning sets; "
    "gradients are that much smaller than without DeepSpeed. It is so with every DeepSpeed; Adam hardly notices, SGD does.",
    "Fabric: gradients are clipped at norm 1.0 unless the configuration says otherwise, which is DeepSpeed's default and which Fabric "
    "never sets.",
    'PEFT, an adapter saved with its embedding (`target_modules=["embed_tokens"]`), `PeftModel.from_pretrained` at '
    "ZeRO stage 3: PEFT loads it by `load_state_dict` outside of any gather, which finds shape `(0,)`.",
    "TRL, `precompute_ref_log_probs` at ZeRO stage 3: TRL hashes the model's weights outside of any gather. Here that is a "
    "`ShardError`. Load the model before the arguments are made.",
    "PEFT, `TrainableTokens` at ZeRO stage 3: PEFT asks for CUDA by name.",
)
