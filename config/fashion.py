# Fashion-MNIST, class-conditional, 32 x 32, grey: real pictures on a CPU.
#
#   python tests/fashion.py --source=DOWNLOADS      # its four files, as downloaded
#   python train.py config/fashion.py
#   python sample.py --ckpt out-fashion/ckpt.pt
out_dir = 'out-fashion'
dataset = 'fashion'
patch = 4
width = 128
depth = 4
heads = 4
T = (0.5,)
image_tokens = True     # not the paper's: see tests/README.md

batch_size = 32
max_iters = 8000
eval_interval = 2000
learning_rate = 3e-3
min_lr = 3e-5
warmup_iters = 50
beta2 = 0.99
ema_decay = 0.999

method = 'midpoint'
steps = 10
cfg = 2.0
compile = False
