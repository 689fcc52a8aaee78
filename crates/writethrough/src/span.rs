//! The spans of cache commands. Made only inside an enabled span, so that a request that is not
//! traced pays a look at a thread-local and nothing more.

/// A client span named after what the command does for the caller.
macro_rules! cache_span {
    ($name:literal, $operation:literal, $session:expr, $key:expr, $epoch:expr) => {
        if tracing::Span::current().is_none() {
            tracing::Span::none()
        } else {
            tracing::info_span!(
                target: "writethrough",
                $name,
                otel.kind = "client",
                db.system.name = $session.system(),
                db.operation.name = $operation,
                cache.key = %$key,
                cache.epoch = $epoch.map(|epoch: writethrough_protocol::Epoch| epoch.0),
                cache.hit = tracing::field::Empty,
            )
        }
    };
}

pub(crate) use cache_span;
