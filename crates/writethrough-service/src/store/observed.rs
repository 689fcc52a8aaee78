//! Spans and metrics around every operation of a store.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use tracing::{Instrument, Span};
use writethrough::{Guard, OpError};

use super::{
    Condition, ItemStore, Operation, PoolUse, Refusal, StoreError, StoreFailure, WriteResult,
};
use crate::item::{Item, ItemFields, ItemId, NewItem, Page, PageRequest};
use crate::metrics::Metrics;

/// The span's name is the promised one for each store, so that the same trace is read the same
/// way; `db.system.name` tells the stores apart.
fn span_name(operation: Operation) -> &'static str {
    match operation {
        Operation::Select => "postgres_select",
        Operation::SelectAll => "postgres_select_all",
        Operation::Insert => "postgres_insert",
        Operation::Update => "postgres_update",
        Operation::Delete => "postgres_delete",
    }
}

fn sql_verb(operation: Operation) -> &'static str {
    match operation {
        Operation::Select | Operation::SelectAll => "SELECT",
        Operation::Insert => "INSERT",
        Operation::Update => "UPDATE",
        Operation::Delete => "DELETE",
    }
}

/// A store with spans and metrics.
pub struct ObservedStore {
    store: Arc<dyn ItemStore>,
    metrics: Arc<Metrics>,
}

impl ObservedStore {
    /// Observes `store`.
    #[must_use]
    pub fn new(store: Arc<dyn ItemStore>, metrics: Arc<Metrics>) -> Self {
        Self { store, metrics }
    }

    async fn observe<T, E: Failed>(
        &self,
        operation: Operation,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let span = self.span(operation);
        let started = Instant::now();
        let result = work.instrument(span.clone()).await;
        let failure = result.as_ref().err().and_then(Failed::failure);
        self.metrics
            .store_operation(operation, started.elapsed(), failure.is_none());
        if let Some(failure) = failure {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", failure);
        }
        result
    }

    fn span(&self, operation: Operation) -> Span {
        // A request that is not traced has no span, and then a look at a thread-local is all it pays.
        if Span::current().is_none() {
            return Span::none();
        }
        tracing::info_span!(
            target: "writethrough",
            "store",
            otel.name = span_name(operation),
            otel.kind = "client",
            otel.status_code = tracing::field::Empty,
            error.type = tracing::field::Empty,
            db.system.name = self.store.system(),
            db.operation.name = sql_verb(operation),
            db.collection.name = "items",
            db.query.summary = format_args!("{} items", sql_verb(operation)),
        )
    }
}

/// Tells a failure from an ordinary answer.
trait Failed {
    /// The value of `error.type`.
    fn failure(&self) -> Option<&'static str>;
}

impl Failed for StoreError {
    fn failure(&self) -> Option<&'static str> {
        Some(match self.failure() {
            StoreFailure::Unavailable => "unavailable",
            StoreFailure::Overloaded => "overloaded",
            StoreFailure::Internal => "internal",
        })
    }
}

impl Failed for OpError<Refusal> {
    fn failure(&self) -> Option<&'static str> {
        match self {
            Self::Fenced => Some("fenced"),
            Self::Rejected(Refusal::Missing | Refusal::Mismatch) => None,
            Self::Rejected(Refusal::Store(error)) => Failed::failure(error),
            Self::Unavailable(_) => Some("unavailable"),
            _ => Some("outcome_unknown"),
        }
    }
}

#[async_trait]
impl ItemStore for ObservedStore {
    fn system(&self) -> &'static str {
        self.store.system()
    }

    async fn select(&self, id: ItemId) -> Result<Option<Item>, StoreError> {
        self.observe(Operation::Select, self.store.select(id)).await
    }

    async fn select_page(&self, request: PageRequest) -> Result<Page, StoreError> {
        self.observe(Operation::SelectAll, self.store.select_page(request))
            .await
    }

    async fn insert(&self, guard: Option<Guard>, item: NewItem) -> WriteResult<Item> {
        self.observe(Operation::Insert, self.store.insert(guard, item))
            .await
    }

    async fn update(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        fields: ItemFields,
        condition: Condition,
    ) -> WriteResult<Item> {
        self.observe(
            Operation::Update,
            self.store.update(guard, id, fields, condition),
        )
        .await
    }

    async fn delete(
        &self,
        guard: Option<Guard>,
        id: ItemId,
        condition: Condition,
    ) -> WriteResult<()> {
        self.observe(Operation::Delete, self.store.delete(guard, id, condition))
            .await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.store.ping().await
    }

    fn pool_use(&self) -> PoolUse {
        self.store.pool_use()
    }

    fn shortage(&self) -> Option<String> {
        self.store.shortage()
    }

    async fn close(&self) {
        self.store.close().await;
    }
}
