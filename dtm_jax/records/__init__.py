"""Write and read the records of a run: config.json, metrics, the lock, and recordings of failed steps.

run_config       keeps the config and the history of starts in config.json, and compares them at each start
changes          says which changes of a config change the meaning of a run
fingerprints     computes checksums of weights and images, so that moved files do not count as a change
provenance       says which code runs: versions, commit, checksum of the source
metrics          the numbers of a run: log, TensorBoard and metrics.jsonl
metrics_file     metrics.jsonl, one line for each step, local or in a bucket
reporting        writers, profiles and parameter tables. Only this file imports CLU
step_window      the steps since the last log line: measurements, images/s, waiting time
compilations     counts the compilations of the train step
lock             lock.json: one run at a time in a workdir
process_identity says whether the process that holds a lock still runs
flight_recorder  records the steps that lead to a loss that is not finite
recording        reads such a recording
replay           runs the recorded steps again and finds the first value that is not finite
"""
