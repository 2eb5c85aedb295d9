# The quick start: class-conditional 32 x 32 digits on a CPU, drawn by data.py itself.
out_dir = 'out-digits'
dataset = 'digits'
patch = 4
width = 128
depth = 4
heads = 4
T = (0.5,)
image_tokens = True     # not the paper's, but a smaller distance: see tests/README.md

batch_size = 32
max_iters = 2100
eval_interval = 700
learning_rate = 3e-3
min_lr = 3e-5
warmup_iters = 50
beta2 = 0.99
ema_decay = 0.999

method = 'midpoint'
steps = 10
cfg = 2.0
compile = False         # on a CPU it takes longer to compile than to train
