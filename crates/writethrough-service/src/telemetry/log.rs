//! The log: lines on standard error, written by a thread of its own. Whoever reads them may stop to read
//! or go away; nothing waits for that. What finds the bounded buffer full is lost, counted, and said as
//! soon as somebody reads again.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::Duration;

use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;

use super::export;
use crate::config::{Config, LogFormat};

/// Lines that wait to be written.
const WAITING_LINES: usize = 4096;
/// How often it is looked whether lines were lost.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Counts the lines that were lost. A process has one log.
static LOST: OnceLock<ErrorCounter> = OnceLock::new();

/// How many lines of the log were lost, because standard error was not read.
pub(crate) fn lost_lines() -> usize {
    LOST.get().map_or(0, ErrorCounter::dropped_lines)
}

/// The log's layer, and the guard that writes what waits when it is dropped, for a second at most.
pub(super) fn layer<S>(config: &Config) -> (Box<dyn Layer<S> + Send + Sync>, WorkerGuard)
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING_LINES)
        .thread_name("log")
        .finish(std::io::stderr());
    let _ = LOST.set(writer.error_counter());
    (formatted(config, writer), guard)
}

fn formatted<S>(config: &Config, writer: NonBlocking) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let filter = EnvFilter::try_new(&config.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    let filter = filter.and(filter_fn(|metadata| {
        metadata.is_event() && !export::of_the_library(metadata.target())
    }));
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    match config.log_format {
        LogFormat::Human => layer
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => layer
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_filter(filter)
            .boxed(),
    }
}

/// Says how many lines were lost, each time that some were. Ends with the runtime.
pub(super) async fn tell_losses() {
    let mut told = 0;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let lost = lost_lines();
        if lost > told {
            let count = lost - told;
            tracing::warn!(
                "{count} lines of the log were lost: standard error was not read in time"
            );
            told = lost;
        }
    }
}

/// Puts panics into the log like everything else, instead of beside it, where they would wait for a reader.
pub(super) fn take_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            tracing::error!("{panic}\n{backtrace}");
        } else {
            tracing::error!("{}", panic.to_string().replace('\n', " "));
        }
    }));
}
