"""What training added to a base: W + dW, one weight at a time, from a finished run's files.

    harness anatomy outputs/main_seeds            # every finished run of an experiment
    harness anatomy outputs/main_seeds/RUN_NAME   # one run
    harness compress RUN --ranks 1,2,4,full       # which rank does dW need?
    harness interpolate RUN --scales 0,0.5,1      # W + lambda dW: learning and forgetting

`updates` gives W and W + dW of every weight that changed, `spectra` measures a matrix, `overlap`
compares the directions of two runs, `functions` compares what two models compute on held-out text,
`survey` goes through the runs of an experiment and `summary` prints them.

Legend: W (m, n) maps n inputs to m outputs, y = W x, however it is stored (Conv1D and Embedding
keep W^T); p = min(m, n); dW = U diag(s) V^T with s descending; k, i, j numbers of directions.
"""
