"""The conductor: builds everything under `deepspeed.initialize` and runs the training step.

Called by scripts
    initialize          the doors: `initialize`, `add_config_arguments`
    engine              what `initialize` returns
    checkpoints         its methods that save and load
    queries             its questions about the configuration
    script_attributes   what else scripts of the original read of it; script_experts: of layers with experts
    compile             `engine.compile`
    data                loaders of training data
Building
    build               what stands under an engine, in the order of dependence
    agreement           do all ranks have the same configuration and model?
    owners              a model has one live engine; holders: what libraries hold of an engine that has ended
    earlier_states      states of an optimizer that stepped before it was handed in
    tensor, experts     what these do to a model before anything is built; cut_experts: where ranks share layers
The step
    step                forward, backward, the end of a micro-batch, in the order in which it happens
    accumulation        which micro-batch is the last of a step
    forward             casts and autocast around the model
    backward            what happens around every backward: the loss scale checked, gradients shown
    recompute           activation checkpointing that the configuration asks for
    schedules           all that is stepped beside the weights, by name; scheduler_call: how a learning rate's is
Watching
    facts               what watchers are told: progress, a step, a run
    observer            what a watcher is; observe: which ones a configuration asks for
    step_report         a step's figures; step_work: its operations, waits and bytes
    step_profiler       the section `flops_profiler`
    step_trace          the keys `monitor.trace_...`
    expert_load         how evenly experts are used
    at_rest             bytes by kind; out_of_memory: what to say when there are not enough
    probe, trial        runs of the autotuner, seen from inside; message_costs: what a message costs here besides its bytes
Pipelines
    pipeline            the engine of a model that is cut in depth
    pipeline_batch      a batch, taken before anything is computed
    pipeline_lists      which list of actions a batch is; pipeline_work: what an action does, with ZeRO around it
    pipeline_late       batches that nobody waits for at their end
    pipeline_trace      what the actions took
    pipeline_places     where a rank is, by the names of scripts; pipeline_instructions: the contract's schedules
"""
