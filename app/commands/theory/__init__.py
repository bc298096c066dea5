"""The theory lab: the matrix-sensing problems of arXiv:2502.01235, small, in float64, many at once.

Names are PEFT's: a weight W (m, n) is output x input, its change is lora_B (m, r) @ lora_A (r, n).
The paper writes weights as input x output, so that

    paper    W (d, k)   A (d, r)     B (r, k)     left singular space   right singular space
    here     W^T        lora_A^T     lora_B^T     input side (n)        output side (m)

Every tensor has the instances in front: (P, m, n) holds P matrices of independent problems.
"""
