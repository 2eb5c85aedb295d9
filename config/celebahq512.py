# CelebA-HQ 512 x 512, unconditional (Table 1, Table 6).
#
#   python data.py --source=celeba_hq/ --out=data/celebahq512 --size=512 --vae=stabilityai/sd-vae-ft-mse --batch_size=16
#   torchrun --nproc_per_node=8 train.py config/celebahq512.py
#
# The paper's: FID 4.04 (50,000 samples, dopri5, NFE 85), 8 H200 for 3.1 days, 82.8 GB per GPU. Ours: not run.
out_dir = 'out-celebahq512'
dataset = 'celebahq512'

# DiT-L/2, three scales: 64 x 64, 32 x 32 and 16 x 16 latents
patch = 2
width = 1024
depth = 24
heads = 16
T = (0.67, 0.33)

batch_size = 256            # on less memory: --gradient_accumulation_steps=2, or --checkpoint_blocks=True
max_iters = 1000 * 30_000 // 256       # 1,000 epochs: 117,187
learning_rate = 2e-4
min_lr = 1e-6
ema_decay = 0.0             # Table 6: none

eval_interval = 5000
eval_images = 256
log_interval = 10
sample_images = 20
