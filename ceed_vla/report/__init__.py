"""One self-contained page that shows runs: ``ceed-vla report``.

    command.py     the command, and `write_page` for the commands that write a page themselves
    runs.py        what kind of run a folder holds, and its JSON
    html.py        elements with escaped text
    page.py        the page: style, scripts, comparison, runs
    tables.py      sortable tables
    plots.py       figures for plotly.js
    evaluation.py, calibration.py, tuning.py, training.py, ros.py
                   what is shown of a run, one file a kind

It reads the files of runs and imports neither the simulator, nor training, nor torch.
"""
