"""Where does LoRA-Mini beat LoRA at an equal number of trained parameters?

python -m experiments.sweep_e2e --model MODEL_DIR --data TRAIN.jsonl --valid VALID.jsonl
"""
