"""A list of every private name of Lightning that lightkit depends on.

After an upgrade of Lightning, the tests of this list name those that are gone. Those that are still there may have
another meaning: read them again, then move them to the new release.
"""

from __future__ import annotations

# Dotted paths by the release of Lightning that they were read in. The last part may be an attribute of instances.
USED: dict[str, tuple[str, ...]] = {
    "2.6.6": (
        # The step and its loops: lightkit._lightning.loops.
        "lightning.pytorch.loops.fetchers._DataFetcher",
        "lightning.pytorch.loops.fetchers._DataLoaderIterDataFetcher",
        "lightning.pytorch.loops.fit_loop._FitLoop._combined_loader",
        "lightning.pytorch.loops.fit_loop._FitLoop._data_fetcher",
        "lightning.pytorch.loops.fit_loop._FitLoop._data_source",
        "lightning.pytorch.loops.fit_loop._FitLoop._should_accumulate",
        "lightning.pytorch.loops.fit_loop._FitLoop._skip_backward",
        "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._make_closure",
        "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._optimizer_step",
        "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._training_step",
        "lightning.pytorch.loops.progress._ProcessedTracker",
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._batches_that_stepped",
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor",
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._build_kwargs",
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._is_training_done",
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._results",
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._should_check_val_epoch",
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._warning_cache",
        "lightning.pytorch.plugins.precision.Precision._after_closure",
        "lightning.pytorch.plugins.precision.Precision._clip_gradients",
        "lightning.pytorch.plugins.precision.Precision._wrap_closure",
        "lightning.pytorch.trainer.Trainer._data_connector",
        "lightning.pytorch.trainer.Trainer._logger_connector",
        "lightning.pytorch.trainer.Trainer._signal_connector",
        "lightning.pytorch.trainer.Trainer._val_check_time_interval",
        "lightning.pytorch.trainer.call._call_callback_hooks",
        "lightning.pytorch.trainer.call._call_lightning_module_hook",
        "lightning.pytorch.trainer.call._call_strategy_hook",
        "lightning.pytorch.trainer.connectors.data_connector._DataConnector._datahook_selector",
        "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector._original_handlers",
        "lightning.pytorch.utilities.combined_loader.CombinedLoader._iterator",
        # The module: lightkit._lightning.module.
        "lightning.pytorch.core.module.LightningModule._compiler_ctx",
        "lightning.pytorch.core.module.LightningModule._current_fx_name",
        "lightning.pytorch.core.module.LightningModule._on_before_batch_transfer",
        "lightning.pytorch.core.module.LightningModule._trainer",
        # What is logged: lightkit._lightning.metrics.
        "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector._callback_metrics",
        "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector._current_fx",
        "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector._first_loop_iter",
        "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector._logged_metrics",
        "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector._progress_bar_metrics",
        "lightning.pytorch.trainer.connectors.logger_connector.result._ResultCollection._extract_batch_size",
        "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric._computed",
        "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric._forward_cache",
        "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric._update_count",
        # Callbacks: lightkit._lightning.callbacks.
        "lightning.pytorch.callbacks.ModelCheckpoint._every_n_train_steps",
        "lightning.pytorch.callbacks.ModelCheckpoint._train_time_interval",
        "lightning.pytorch.callbacks.Timer._duration",
        # Strategies: lightkit._lightning.strategies.
        "lightning.pytorch.overrides.distributed._register_ddp_comm_hook",
        "lightning.pytorch.overrides.distributed._sync_module_states",
        "lightning.pytorch.strategies.DDPStrategy._model_averager",
        "lightning.pytorch.strategies.launchers._SubprocessScriptLauncher",
    )
}

# Members that a subclass in lightkit overrides or reads of itself.
INHERITED: dict[str, tuple[str, ...]] = {
    "2.6.6": (
        "lightning.pytorch.callbacks.WeightAveraging._average_model",
        "lightning.pytorch.callbacks.WeightAveraging._swap_models",
        "lightning.pytorch.callbacks.ModelCheckpoint._enable_version_counter",
        "lightning.pytorch.callbacks.ModelCheckpoint._every_n_epochs",
        "lightning.pytorch.callbacks.ModelCheckpoint._get_metric_interpolated_filepath_name",
        "lightning.pytorch.callbacks.ModelCheckpoint._monitor_candidates",
        "lightning.pytorch.callbacks.ModelCheckpoint._save_checkpoint",
        "lightning.pytorch.callbacks.ModelCheckpoint._save_last_checkpoint",
        "lightning.pytorch.callbacks.ModelCheckpoint._save_on_train_epoch_end",
        "lightning.pytorch.callbacks.ModelCheckpoint._save_topk_checkpoint",
        "lightning.pytorch.callbacks.ModelCheckpoint._should_save_on_exception",
        "lightning.pytorch.callbacks.ModelCheckpoint._should_save_on_train_epoch_end",
        "lightning.pytorch.callbacks.ModelCheckpoint._should_skip_saving_checkpoint",
        "lightning.pytorch.loggers.CSVLogger._experiment",
        "lightning.pytorch.loggers.csv_logs.ExperimentWriter._check_log_dir_exists",
        "lightning.pytorch.loggers.csv_logs.ExperimentWriter._record_new_keys",
        "lightning.pytorch.strategies.DDPStrategy._ddp_comm_hook",
        "lightning.pytorch.strategies.DDPStrategy._ddp_comm_state",
        "lightning.pytorch.strategies.DDPStrategy._ddp_comm_wrapper",
        "lightning.pytorch.strategies.DDPStrategy._register_ddp_hooks",
        "lightning.pytorch.strategies.DDPStrategy._setup_model",
        "lightning.pytorch.strategies.ParallelStrategy._launcher",
        "lightning.pytorch.strategies.Strategy._configure_launcher",
        "lightning.pytorch.strategies.ParallelStrategy._layer_sync",
        "lightning.pytorch.strategies.Strategy._lightning_optimizers",
        "lightning.pytorch.strategies.Strategy._precision_plugin",
    )
}
