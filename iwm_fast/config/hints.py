"""Other frameworks' names for our keys and options, so that an error can suggest ours."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Hint", "canonical", "hint_of"]


@dataclass(frozen=True)
class Hint:
    """Our keys of the configuration and options of the command line for another framework's name, likeliest first.

    note: one remark, without a full stop.
    """

    keys: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    note: str = ""


_LAUNCHER = "start ranks with a launcher: torchrun --nproc_per_node N -m iwm_fast pretrain ..., deepspeed or srun"
# Our keys, then options, and a note; below, indented, the other names.
_TABLE = f"""
train.global_batch --batch |
    batch bs batch_size batch_sz global_batch_size total_batch_size train_batch_size effective_batch_size
    mini_batch_size minibatch n_batch
train.micro_batch | train.global_batch counts all ranks
    per_device_batch_size per_device_train_batch_size per_gpu_batch_size per_gpu_train_batch_size
    batch_size_per_gpu batch_size_per_device batch_per_gpu micro_batch_size micro_bs
    train_micro_batch_size_per_gpu local_batch_size device_batch_size samples_per_gpu
train.micro_batch | accumulation follows: train.global_batch / (ranks × micro_batch)
    accumulation_steps gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps accum_iter
    accumulate_grad_batches accum_steps accumulation update_freq iter_size
train.lr --lr |
    lr learning_rate learningrate base_lr base_learning_rate peak_lr max_lr blr lr0 lr_peak eta
train.lr_start | over the peak
    warmup_lr start_lr warmup_init_lr initial_lr init_lr warmup_start_lr
train.lr_final | over the peak
    min_lr final_lr end_lr eta_min lr_min lr_end lrf minimum_lr
train.lr_batch |
    base_batch_size lr_base_size reference_batch_size lr_reference_batch auto_scale_lr
train.warmup | in steps; or train.warmup_epochs, train.warmup_ratio
    warmup_steps num_warmup_steps warmup_iters warmup_iterations lr_warmup_steps n_warmup warmup_t warm_up
train.warmup_epochs |
    warmup_epochs warmup_epoch num_warmup_epochs warmup_ep
train.warmup_ratio | of the schedules' steps
    warmup_ratio warmup_fraction warmup_frac warmup_percent warmup_proportion pct_start
train.epochs --epochs |
    epoch max_epochs num_epochs n_epochs num_train_epochs total_epochs nb_epochs ep
train.schedule_steps --steps | train.steps stops training earlier
    max_steps num_steps n_steps total_steps iterations num_iterations max_iterations iters max_iter max_iters
    num_iters total_iters training_steps train_steps num_train_steps max_train_steps train_iters
train.weight_decay --weight-decay |
    wd decay weight_decay_start weight_decay_end final_weight_decay l2 l2_reg
train.clip |
    grad_clip max_grad_norm clip_grad clip_grad_norm gradient_clip gradient_clip_val gradient_clipping max_norm
    clip_norm grad_norm_clip grad_norm clip_gradient clip_value
train.ema | [first, last]
    ema_decay ema_momentum ema_rate ema_start ema_end momentum teacher_momentum momentum_teacher
    final_momentum_teacher target_momentum model_ema_decay tau moving_average_decay polyak
train.betas | [first, second]
    beta beta1 beta2 adam_beta1 adam_beta2 adam_betas opt_betas
train.precision | bf16 or fp32
    fp16 bf16 fp32 amp dtype mixed_precision use_amp half use_bfloat16 bfloat16 float16 torch_dtype autocast
    amp_dtype use_fp16 use_bf16 param_dtype compute_dtype
train.deterministic |
    deterministic_algorithms use_deterministic_algorithms cudnn_deterministic
train.compile |
    torch_compile use_compile compile_model
train.activation_checkpointing |
    gradient_checkpointing grad_checkpointing use_checkpoint checkpoint_activations activation_checkpoint remat
    recompute checkpointing
train.optimizer |
    opt optim optimizer_name optimizer_type
train.seed --seed |
    random_seed manual_seed rng_seed random_state
train.rank_timeout_s |
    timeout nccl_timeout ddp_timeout dist_timeout timeout_s
data.root --data --root |
    data dataset datasets data_dir data_path data_folder data_root dataset_path dataset_dir dataset_root
    dataset_name train_dir train_path train_data train_root traindir train_folder image_dir image_folder
    image_path images_dir root_path imagenet_path imagenet input_dir input train_data_dir
eval.root |
    val_dir val_path val_data val_root valdir eval_data eval_dir eval_path test_dir test_path test_data
    validation_dir validation_data val
eval.every_steps |
    eval_every eval_steps eval_interval eval_freq eval_period val_interval val_every val_freq val_check_interval
    evaluation_interval
eval.every_epochs |
    check_val_every_n_epoch eval_every_epochs eval_epochs val_epochs eval_every_epoch val_every_epochs
data.threads --threads | data.readers is the number of files read concurrently
    workers num_workers n_workers nworkers dataloader_num_workers num_data_workers dali_threads cpu_workers
    num_threads n_threads j num_cpus data_workers loader_workers
data.readers |
    io_workers io_threads num_readers read_threads
data.order |
    shard_shuffle shuffle_shards shuffle sampler
data.shuffle_window |
    shuffle_buffer shuffle_buffer_size shuffle_size
data.prefetch |
    prefetch_factor prefetch_batches prefetch_queue_depth queue_size buffer_size
model.image | pixels
    img_size image_size resolution res input_size crop_size imgsz im_size img img_sz image_resolution
    input_resolution height
model.patch | pixels
    patch_size patch_sz patchsize
model.encoder | a name, or {{depth, width, heads}}
    arch architecture backbone model model_name model_type model_size model_arch net network vit encoder_name
model.encoder.width | model.predictor.width is the predictor's
    embed_dim hidden_size hidden_dim d_model dim n_embd emb_dim embedding_dim embed_size num_features enc_dim
    encoder_dim model_dim
model.encoder.depth | model.predictor.depth is the predictor's
    depth num_layers n_layers n_layer layers num_hidden_layers num_blocks n_blocks encoder_depth enc_depth
model.encoder.heads | model.predictor.heads are the predictor's
    num_heads n_heads n_head nhead nheads num_attention_heads encoder_heads
model.encoder.mlp_ratio |
    mlp_dim intermediate_size ffn_dim mlp_hidden_dim ffn_ratio
model.predictor.depth |
    pred_depth predictor_depth predictor_layers pred_layers decoder_depth
model.predictor.width |
    pred_emb_dim pred_dim pred_width predictor_embed_dim predictor_dim predictor_width decoder_embed_dim
model.predictor.heads |
    pred_heads predictor_heads predictor_num_heads pred_num_heads decoder_num_heads
model.target_init | with model.target=frozen
    teacher teacher_path teacher_weights teacher_checkpoint teacher_ckpt target_weights target_checkpoint
    pretrained_teacher distill_from
model.freeze_encoder | with model.init
    freeze freeze_backbone frozen_backbone frozen_encoder backbone_frozen freeze_vision_model
    freeze_vision_tower
model.attention |
    attn attn_implementation attention_backend attn_backend flash_attn use_flash_attn use_sdpa
--out |
    output output_dir output_path out_dir save_dir save_path run_dir log_dir logdir work_dir default_root_dir
    checkpoint_dir ckpt_dir exp_dir results_dir exp exp_name experiment experiment_name run_name workdir
--resume --checkpoint |
    ckpt ckpt_path checkpoint_path resume_from resume_from_checkpoint resume_path resume_checkpoint load_from
    load load_checkpoint restore restore_from continue checkpoint resume auto_resume
model.init | a file or folder of weights that a new run starts from; --resume continues a run
    pretrained pretrained_weights pretrained_path weights init_from init_weights finetune_from backbone_weights
--json |
    json_out json_file output_json out_json save_json
log.every_steps |
    log_interval log_every log_freq log_steps log_period logging_steps log_every_n_steps print_freq print_every
    disp_freq interval every freq frequency period
checkpoint.every_steps |
    save_every save_interval save_steps save_freq save_period save_every_n_steps ckpt_every ckpt_interval
    ckpt_freq checkpoint_every checkpoint_interval checkpoint_freq checkpoint_steps every_n_train_steps
checkpoint.every_epochs |
    save_epoch_freq saveckp_freq save_every_epochs every_n_epochs save_epochs checkpoint_epochs save_every_epoch
checkpoint.keep_last | checkpoint.keep_every keeps some forever
    save_total_limit save_top_k keep max_checkpoints max_keep max_to_keep keep_checkpoints num_checkpoints
    checkpoints_total_limit keep_last_n
log.wandb | the project's name
    wandb wandb_project project use_wandb wandb_name project_name
log.tensorboard | true or false
    tb tensorboard tensorboard_dir use_tensorboard
log.prometheus_port |
    prometheus metrics_port
zero.stage | 0 to 3
    zero zero_stage deepspeed deepspeed_stage deepspeed_config zero_optimization fsdp sharding zero_optimizer
zero.hpz_partition_size | with zero.stage 3: ranks of a host
    zero_hpz_partition_size hpz hpz_size hpz_partition hybrid_shard hybrid_sharding sharding_group_size
masks.target_blocks |
    num_pred_masks npred num_targets num_target_blocks num_masks
masks.target_scale |
    pred_mask_scale mask_scale mask_ratio
masks.context_scale |
    enc_mask_scale
masks.min_context |
    min_keep
actions.strength |
    color_jitter color_jitter_strength jitter jitter_strength
actions.crop_scale |
    rrc_scale random_resize_scale random_resized_crop scale
actions.flip_probability |
    hflip horizontal_flip use_horizontal_flip flip
actions.blur_probability |
    gaussian_blur use_gaussian_blur blur
--gpus-per-node | {_LAUNCHER}
    gpus gpu devices num_gpus n_gpu n_gpus ngpus num_devices nproc nproc_per_node world_size num_processes ddp
    distributed multi_gpu
--nodes | {_LAUNCHER}
    num_nodes nnodes n_nodes nodes hosts num_hosts
--device | training uses the GPU if there is one; CUDA_VISIBLE_DEVICES selects it
    device accelerator cuda use_cuda no_cuda cpu use_gpu
| the schedule is linear warm-up, then cosine decay (train.warmup, train.lr_final)
    scheduler lr_scheduler sched lr_schedule lr_decay scheduler_type decay_lr
| give the configuration as the first argument, without an option
    config cfg config_file config_name config_path fname
"""


def canonical(name: str) -> str:
    """Return a name in lower case without its section, dashes and underscores: "batchsize" for --Batch-Size."""
    return name.rsplit(".", 1)[-1].replace("-", "").replace("_", "").lower()


def _read(table: str) -> dict[str, Hint]:
    found: dict[str, Hint] = {}
    hint = Hint()
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            ours, _, note = line.partition("|")
            words = ours.split()
            options = tuple(word for word in words if word.startswith("--"))
            hint = Hint(tuple(word for word in words if word not in options), options, note.strip())
            continue
        for name in line.split():
            if found.setdefault(canonical(name), hint) is not hint:
                raise ValueError(f"{name} is in the table twice")
    return found


_HINTS = _read(_TABLE)


def hint_of(name: str) -> Hint | None:
    """Return our names for another framework's key or option (dashes optional), or None where it is unknown."""
    return _HINTS.get(canonical(name))
