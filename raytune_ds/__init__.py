"""raytune_ds: fine-tunes DeepSeek-family models on Ray, by LoRA or with all parameters.

The map of the house. A module imports only what stands above it; `tests/unit/test_layers.py` holds that.

    errors, console, storage, hub      what a user caused; what people see; files anywhere; the Hugging Face hub
    lease                              one driver at a time, at a run or at a store
    tensorfile                         ranges of the tensors in a safetensors file anywhere
    section, cluster-/sweep-/adapterconfig, config  the config tree; compatible: what goes with what in it
    keys, yamlfile, compose, naming    how YAML and key=value become one; names made from it
    adapterreport, ending              what an adapter trains, for people; how a worker ended, for the driver
    deploy/                            the files of a cluster, made from the config
    data/values, conversation          what a row's JSON holds; messages of any spelling to a conversation
    data/demonstrations, preferences   rows that show answers; rows that judge them
    data/formats                       any row to one `Example`, whatever its format
    data/sources, readers              the rows of any file
    data/order                         pure: (seed, epoch, step, slot) to the pack that is read
    data/labels                        what a document is to an objective that judges answers
    data/packing, findings, store      token sequences to packs; what is wrong with rows; packs to shards and back
    data/tokenizer, mixture, inputs    tokenizers; how many rows of which source; which files a run reads
    data/bulk, literal, thinking, chat ids of many texts at once; text that must not become a control token; the
                                       reasoning of an answer; the chat template as servers use it
    data/plainanswers                  how a template writes an answer that is only text
    data/turntokens, template          ids of rendered turns; `Example` to ids and loss weights
    data/batchid, rows, prepared       a batch's fingerprint; the rows it was made of; what tells stores apart
    data/sketch, inspection, sightings what a text has in common with others; what is odd about a row; how often
    data/job, chunks, fit, scatter     what tasks are told and tell; rows to sequences that fit, scattered over buckets
    data/duplicates, gate, buckets     rows that come twice; whether a run may begin; sequences to packs
    data/tasks (R), making, prepare    tasks for all CPUs; what does it all, once; a store, found or made
    data/share, batch, stream (R)      what a rank reads of a global batch, as `Batch`es, read ahead
    data/show, sample, spelled, page   a store as a person sees it: in the terminal; a bounded look at its packs; tokens
                                       one by one; a page of all that
    allocator, phases, world, rundir   how memory is given out; what a step is at; the ranks; the run directory
    watch, downtime, stacks            workers that hang; what a restart costs; the stacks of a process
    profilepage, profiling             where the time of a step goes: the page, and how it is measured
    model/                             a model's folder, tiny models, packed attention and losses, the kernels that
                                       compute them, weights by ranges; what a model is made of (anatomy), which of it
                                       is adapted (targets); adapters, what they begin with (initial), and those of bare
                                       parameters on the tokens (lowrank, grouped); frozen weights as bytes (lowbits,
                                       quantize); build: the module that is trained, without weights yet; footprint:
                                       what a pass takes of memory
    objectives/, engines/              a batch to a loss sum; gradients to an update, and who holds which part
    catalog, checkpoint, saver         which checkpoints there are; of no engine and no world size; taking them while
                                       training goes on
    before                             the model that a run began with, whole and at its commit
    tracking, modelcard                what else a run leaves behind
    modelfiles, export                 the weight files of a model; final/
    wrapped, merge, combine            a base model without memory in an adapter; the two merged; adapters made one
    logits, tuned, gguf, push          a merged model beside its adapter; what llama.cpp wants; to the hub
    bysource                           losses of each source
    milestones, guard, loop            how long a run is and what happens when; steps that go wrong; the training loop
    assignment, memory, hooks, worker  what a worker is told; how much it computes at once; what its loop sets off; one
                                       worker, start to end (no Ray)
    sampling, decode, generate         how tokens are chosen; a batch, token by token; answers of a finished run
    prompts, terminal                  files of prompts and answers; answers as a person sees them
    network, nodes (R), doctor/        the interface between nodes; a function on each of them; what is wrong
    found, settle, look                what earlier looks at a model found; what it decides of a config; a look at it
    check, cluster, preflight (R)      what is tried first, of the config and of the cluster; the Ray it runs on
    metrics, torchgroup (R)            the run as Ray metrics; torch's process group
    mailbox, reporter, lookout (R)     between workers and driver; what Ray Train's controller tells; nodes about to go
    rayworker, fitting (R)             a worker inside Ray Train; a run on it
    startup, early (R)                 how long a launch takes to its first step; processes that wait to be workers
    rescue                             what is done about workers that hang
    launch (R)                         a config to a finished run
    sweep/ (R)                         many runs that differ in a few settings: space and journal; searchers and
                                       schedulers; a trial, as Ray Tune sees it; leaderboard, page, promotion
    trained                            what a run was trained on
    evaluation/ (R), evaluate          losses, answers and tasks of a finished run beside its base, with intervals
    demo/, train, compare              the bundled demo; runs side by side
    verify, steps                      the proof of what a run was trained on, its rows
    serving/                           a model behind an OpenAI-compatible address
    origin, takehome                   what is exported, and where it comes from; exports
    verbs/, cli                        the command lines

A row's way from a file to a gradient: `inputs` finds files and formats; `prepare` reads them in tasks of Ray, others
turn rows into `Example`s (`formats`), these into ids and weights (`template`), scatter them by a hash of their place
(a global shuffle that no parallelism changes) and pack each bucket (`packing`). The store is found again by a
hash of everything that made it. `order` says which pack each slot of each global batch reads, whatever the number of
workers; `stream` fetches a rank's share ahead of time. `loop` sums the loss weights over all ranks first, so that
`engine.backward(loss_sum / global_weight)` adds up to the gradient of one mean over the whole global batch. The model
sees packs whose documents do not see each other (`model/attention`) and makes logits only where they are trained on
(`model/packed`).

A model's way from its files to `final/`: `model/build` makes the module; an engine asks `model/weights` for the ranges
it keeps, and hands out its state as pieces (name, start, values), which `saver` copies and `checkpoint` writes; whoever
resumes asks the checkpoint's `Reader` for other ranges, and `export` makes of it what peft or transformers load.

A sweep's way: `space` holds every value against the config; `search` suggests, `schedule` decides, and `journal` writes
both down; an `attempt` is a run whose evaluations wait for the decision. After a crash everything is told again from
the journal and the runs' own files, so searcher and scheduler need no state of their own.

A launch's way to its first step: workers' processes are asked for and import torch (`early`), while the driver, which
needs none of it where model, adapter and data were seen before (`found`, `prepare`), checks the rest and starts Ray
Train.

R marks where Ray is imported.
"""
