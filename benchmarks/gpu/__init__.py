"""One benchmark for a CUDA device: what runs there, what each part costs, and what faster variants bring.

    python -m benchmarks.gpu -o results.jsonl            on the device, 300 s
    python -m benchmarks.gpu --tiny --device cpu         all sections with small models, as a test
    python -m benchmarks.gpu --only facts,decoder

Every figure is one line of JSON, written as soon as it is known. Sections have deadlines, and every measurement may
fail alone. Weights are random except pocket's, because the cost does not depend on them.
"""
