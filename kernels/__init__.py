"""S2O itself, in torch and Triton, never vLLM: sparse attention over a paged KV cache.

The path of a chunk of queries:

1. :mod:`work_list` cuts it into segments on the host and says what each may see and visit;
   kernels read that table by the columns of :mod:`layout`.
2. :mod:`prefill` runs the rest of the path, in prefill: rank, select, attend.
3. :mod:`ranking` scores every token of a segment's history, by its mean query or by low-rank
   projections; some of that runs beside it on a :mod:`side_stream`.
4. :mod:`selection` shares the budget, finds each list's threshold and writes physical slots.
5. :mod:`attention` attends to the own segment, to the slots and to summaries of skipped tokens.
6. :mod:`decode` takes the same path for single queries, by what :mod:`decode_state` keeps.

Public are ``SparsePrefill``, ``SparseDecode`` and the tables of 1 and 6. Constants that were
measured stand in :mod:`tuning`, tile shapes in :mod:`tiles`.
"""
