# CelebA-HQ 1024 x 1024, unconditional (Table 1, Table 6).
#
#   python data.py --source=celeba_hq/ --out=data/celebahq1024 --size=1024 --vae=stabilityai/sd-vae-ft-mse --batch_size=4
#   torchrun --nproc_per_node=8 train.py config/celebahq1024.py
#
# The paper's: FID 5.51 (50,000 samples, dopri5, NFE 94), 8 H200 for 8.3 days, 120.5 GB per GPU. Ours: not run.
out_dir = 'out-celebahq1024'
dataset = 'celebahq1024'

# DiT-L/2, three scales: 128 x 128, 64 x 64 and 32 x 32 latents
patch = 2
width = 1024
depth = 24
heads = 16
T = (0.67, 0.33)

batch_size = 128            # on less memory: --gradient_accumulation_steps=2, or --checkpoint_blocks=True
max_iters = 2000 * 30_000 // 128       # 2,000 epochs: 468,750
learning_rate = 2e-4
min_lr = 1e-6
ema_decay = 0.0             # Table 6: none

eval_interval = 5000
eval_images = 128
log_interval = 10
sample_images = 10
