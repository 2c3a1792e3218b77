"""Define the options of a config: their allowed values, how users type them, and the checks before a run.

command_line     from the arguments of a process to a checked config
arguments        splits a command line: the config's file, the typed options, all other flags
config_file      loads the file that `--config` names
overrides        sets the typed options in the config, `--config.optim.lr=1e-3`
sections         dotted keys, and the sections that choose a module, such as `teacher`
known_options    the options that a config may have, and the rule of each
reference        describes options for people: meaning, type, default and choices, for --help and the docs
help_text        the text of --help
validation       checks a config before anything is loaded
cross_checks     checks how several options fit together; evaluator_checks does so for evaluators
value_rules      kinds of rules: `number(0, 1)`, `choice("cosine", "linear")`
run_options, task_options, socket_options
                 the tables: one rule for each option, with its meaning
"""
