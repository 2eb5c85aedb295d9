# ImageNet 256 x 256, class-conditional, DiT-XL/2 (Table 3, Table 6).
#
#   python data.py --source=ILSVRC2012/train --out=data/imagenet256 --size=256 --vae=zelaki/eq-vae-ema
#   torchrun --nproc_per_node=8 train.py config/imagenet256_xl2.py
#
# The paper's, after 600K iterations: FID 14.38 without guidance (NFE 80), 8 H200 for 9.4 days, 68.3 GB per GPU.
# Ours: not run.
out_dir = 'out-imagenet256-xl2'
dataset = 'imagenet256'

# DiT-XL/2, two scales: 32 x 32 and 16 x 16 latents
patch = 2
width = 1152
depth = 28
heads = 16
T = (0.5,)
label_drop = 0.1

batch_size = 256
max_iters = 600_000          # 120 epochs
learning_rate = 1e-4
min_lr = 1e-4                # constant
ema_decay = 0.9999

eval_interval = 25_000
log_interval = 10
sample_images = 50
