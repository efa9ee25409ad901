"""The obvious alternative: FastAPI, uvicorn and a PyFunc, written as their documentation suggests.

https://fastapi.tiangolo.com/advanced/events/ (load once, at start), https://fastapi.tiangolo.com/async/ (a plain `def`
for code that blocks), https://mlflow.org/docs/latest/api_reference/python_api/mlflow.pyfunc.html
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import mlflow.pyfunc
import pandas as pd
from fastapi import FastAPI
from pydantic import BaseModel, Field

MODEL_URI = os.environ["MODEL_URI"]
THRESHOLD = 0.5
models = {}


class Transaction(BaseModel):
    transaction_id: str = Field(min_length=1, max_length=128)
    amount: float = Field(ge=0, allow_inf_nan=False)
    merchant_category: str = Field(min_length=1, max_length=64)
    hour: int = Field(ge=0, le=23)
    day_of_week: int = Field(ge=0, le=6)
    user_age: int = Field(ge=0, le=130)
    account_balance: float = Field(allow_inf_nan=False)


class Transactions(BaseModel):
    transactions: list[Transaction]


class Prediction(BaseModel):
    transaction_id: str
    is_fraud: bool
    fraud_probability: float
    confidence: float
    model_version: str
    prediction_time: datetime


class Predictions(BaseModel):
    predictions: list[Prediction]


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    models["fraud"] = mlflow.pyfunc.load_model(MODEL_URI)
    yield


app = FastAPI(lifespan=lifespan)


def score(transactions: list[Transaction]) -> list[Prediction]:
    frame = pd.DataFrame([transaction.model_dump(exclude={"transaction_id"}) for transaction in transactions])
    now = datetime.now(UTC)
    return [
        Prediction(
            transaction_id=transaction.transaction_id,
            is_fraud=p >= THRESHOLD,
            fraud_probability=p,
            confidence=max(p, 1 - p),
            model_version=MODEL_URI,
            prediction_time=now,
        )
        for transaction, p in zip(transactions, models["fraud"].predict(frame)[:, 1].tolist(), strict=True)
    ]


@app.post("/predict")
def predict(transaction: Transaction) -> Prediction:
    return score([transaction])[0]


@app.post("/predict/batch")
def predict_batch(batch: Transactions) -> Predictions:
    return Predictions(predictions=score(batch.transactions))
