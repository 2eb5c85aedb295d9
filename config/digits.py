# The quick start: class-conditional 32 x 32 digits on a CPU, drawn by data.py itself. The paper's method, small.
out_dir = 'out-digits'
dataset = 'digits'
patch = 4
width = 128
depth = 3
heads = 4
T = (0.4,)             # the paper has 0.5 at 256 x 256

batch_size = 64
max_iters = 1500
eval_interval = 750
learning_rate = 7e-3
min_lr = 7e-5
warmup_iters = 100
beta2 = 0.99
ema_decay = 0.998

method = 'midpoint'
steps = 5
cfg = 2.0
compile = False         # on a CPU it takes longer to compile than to train
