# ImageNet 256 x 256, class-conditional, DiT-B/2 (Table 3, Table 6).
#
#   python data.py --source=ILSVRC2012/train --out=data/imagenet256 --size=256 --vae=zelaki/eq-vae-ema
#   torchrun --nproc_per_node=8 train.py config/imagenet256_b2.py
#
# The paper's, after 7M iterations: FID 18.55, and 4.12 with --cfg=1.5 (NFE 80), 8 H200 for 8.5 days, 24.9 GB per GPU;
# after 600K: FID 36.50. Ours: not run.
out_dir = 'out-imagenet256-b2'
dataset = 'imagenet256'

# DiT-B/2, two scales: 32 x 32 and 16 x 16 latents
patch = 2
width = 768
depth = 12
heads = 12
T = (0.5,)
label_drop = 0.1

batch_size = 256
max_iters = 7_000_000        # 1,400 epochs; the paper's 600K are --max_iters=600_000
learning_rate = 1e-4
min_lr = 1e-4                # constant
ema_decay = 0.9999

eval_interval = 25_000
log_interval = 100
sample_images = 50
