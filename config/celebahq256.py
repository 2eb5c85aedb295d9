# CelebA-HQ 256 x 256, unconditional: the paper's main run (Table 1, Table 6).
#
#   python data.py --source=celeba_hq/ --out=data/celebahq256 --size=256 --vae=zelaki/eq-vae
#   torchrun --nproc_per_node=8 train.py config/celebahq256.py
#
# The paper's: FID 3.53 (50,000 samples, dopri5, NFE 80), 8 H200 for 1.2 days, 42.2 GB per GPU. Ours: not run.
out_dir = 'out'
dataset = 'celebahq256'     # 30,000 images; LFM trained on 27,000: --heldout=3000 in data.py

# DiT-L/2, two scales: 32 x 32 and 16 x 16 latents
patch = 2
width = 1024
depth = 24
heads = 16
T = (0.5,)

batch_size = 256
max_iters = 500 * 30_000 // 256        # 500 epochs: 58,593
learning_rate = 2e-4
min_lr = 1e-6
ema_decay = 0.0             # Table 6: none

eval_interval = 5000
log_interval = 10
sample_images = 50
