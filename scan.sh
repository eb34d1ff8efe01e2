P=/work/main/.venv/bin/python
C="experiment_name=scan train.steps=80 evaluate.every=40"
$P -m harness -m $C method=udv method.rank=64 train.lr=3e-2,1e-1,3e-1
$P -m harness -m $C method=udv method.rank=full train.lr=3e-2,1e-1,3e-1
$P -m harness -m $C method=udv method.rank=full method.residual=keep train.lr=1e-1,3e-1 
$P -m harness -m $C method=udv method.rank=64 method.train=udv train.lr=1e-3,3e-3,1e-2
$P -m harness -m $C method=lora targets=c_attn method.r=1 train.lr=2e-2,5e-2
