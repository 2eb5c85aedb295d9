# Fashion-MNIST, class-conditional, 32 x 32, grey: real pictures on a CPU, by the paper's method. It made assets/fashion.pt.
#
#   python tests/experiments/fashion.py --source=DOWNLOADS      # its four files, as downloaded
#   python train.py config/fashion.py --compile=True
#   python sample.py --ckpt out-fashion/ckpt.pt
out_dir = 'out-fashion'
dataset = 'fashion'
patch = 4
width = 160
depth = 4
heads = 5
T = (0.5,)

batch_size = 64
max_iters = 24_000
eval_interval = 2000
learning_rate = 3e-3
min_lr = 3e-5
warmup_iters = 50
beta2 = 0.99
ema_decay = 0.999

method = 'midpoint'
steps = 10
cfg = 2.0
compile = False         # True pays in so long a run, but needs a C++ compiler
