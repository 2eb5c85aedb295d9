# The quick start: class-conditional 32 x 32 digits on a CPU, drawn by data.py itself.
out_dir = 'out-digits'
dataset = 'digits'
patch = 4
width = 128
depth = 4
heads = 4
T = (0.5,)

batch_size = 64
max_iters = 2000
eval_interval = 500
learning_rate = 2e-3
min_lr = 2e-5
warmup_iters = 50
beta2 = 0.99
ema_decay = 0.999

method = 'euler'
steps = 40
cfg = 2.0
compile = False     # on a CPU it takes longer to compile than to train
